"""Parts of the benchmarks of the service: what is asked, who asks it, and the service that it is compared with."""
