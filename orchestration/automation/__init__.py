"""What runs by itself: sensors, schedules, and the jobs that keep house."""
