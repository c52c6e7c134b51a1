"""Masked diffusion on discrete data: schedules, objectives, networks, samplers. PyTorch only."""
