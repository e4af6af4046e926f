"""Time of a training step, kind by kind: FLOPs and bytes of its parts, divided by the rates of the hardware table."""
