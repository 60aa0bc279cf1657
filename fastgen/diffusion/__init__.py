"""Diffusion and flow matching: one published model per file, on schedules, samplers and one loop that they share."""
