"""The sampling service: `config` is what it can be told, `messages` its HTTP bodies, `app` the Ray Serve deployment."""
