"""`python -m benchmarks.client`. The work is in `measure`: child processes find no functions in `__main__`."""

from benchmarks.client.measure import main

if __name__ == "__main__":
    main()
