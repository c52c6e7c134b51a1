"""Sampling over HTTP: `app` is the Ray Serve application, `config` what it can be told."""
