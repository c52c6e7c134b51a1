"""A dashboard for Grafana, with the figures that training and service have.

python -m infra.grafana > dashboard.json        then import it, or put it into a ConfigMap that Grafana's sidecar reads
"""
