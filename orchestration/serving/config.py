"""What the sampling service can be told. Apart from `app.py`, so that reading a configuration does not load Serve."""

from pydantic import BaseModel, ConfigDict, Field


class ServingConfig(BaseModel):
    """Where `md4 serve` listens and how it batches."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 = every interface")
    port: int = Field(8000, ge=1, le=65535, description="HTTP port")
    max_batch_size: int = Field(8, ge=1, description="most requests answered by one batch")
    batch_wait_ms: float = Field(10.0, ge=0, description="milliseconds a request waits for company")
    replicas: int = Field(1, ge=1, description="copies of the model")
    num_cpus: float = Field(1.0, gt=0, description="CPUs a replica reserves")
