"""Manifests as the renderer writes them, for four ways to run: each `*.yaml` begins with its command.

python -m infra.kuberay.examples        write them again
"""
