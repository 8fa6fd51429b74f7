"""`python -m myserve` is the `myserve` command."""

from myserve.cli import app

if __name__ == "__main__":
    app(prog_name="myserve")
