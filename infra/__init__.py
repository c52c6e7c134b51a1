"""What a cluster needs: images, Kubernetes manifests. Tested as files."""
