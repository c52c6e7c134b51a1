"""The formats of text, a file each: how a source is listed as units, and the documents in the bytes of a unit.

A record that gives no document comes as `Rejected`; `pipelines.sources` decides what follows from that.
"""
