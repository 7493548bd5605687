"""The page of `launch/report.py`: what a run's folder says, as curves, heat maps, flags and tables in one HTML file."""
