"""A run as a person sees it: charts in files, and progress in a terminal."""
