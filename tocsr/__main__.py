"""`python -m tocsr`."""
from tocsr.cli.main import app

if __name__ == "__main__":
    app(prog_name="tocsr")
