"""The sensors and schedules, which start runs by themselves, and the maintenance jobs."""
