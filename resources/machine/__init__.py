"""The machine that engines are built and measured on: its targets, devices, lock and usage."""
