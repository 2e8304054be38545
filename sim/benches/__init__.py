"""Drivers and protocol checkers for cocotb benches of the accelerator's ports."""
