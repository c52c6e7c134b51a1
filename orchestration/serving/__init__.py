"""The sampling service: `config.py` what it can be told, `app.py` the deployment and its HTTP."""
