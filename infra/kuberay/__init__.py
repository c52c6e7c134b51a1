"""KubeRay manifests from the configuration of a run: RayCluster, RayJob, RayService, RayCronJob.

`infra.render` puts them together. Fields are those of KubeRay 1.7; Kubernetes 1.31 or newer.
"""
