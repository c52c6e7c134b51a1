"""What devices can do at most, for model FLOP/s utilisation."""

import torch

# Dense bfloat16 tensor-core products with float32 sums, 10^12 operations a second, from the makers' data sheets. The
# first name that the device's own contains counts.
_BFLOAT16 = {
    "B200": 2250.0,
    "GH200": 989.4,
    "H200": 989.4,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "H20": 148.0,
    "A100": 311.8,
    "A800": 311.8,
    "A40": 149.7,
    "A30": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
}


def peak_flops(device: torch.device, compute: torch.dtype) -> float | None:
    """Operations a second that `device` can do at most when it multiplies `compute`; None where that is not known."""
    if device.type != "cuda" or compute != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for key, peak in _BFLOAT16.items() if key in name), None)
