"""`python -m qdiff`: the console command where its script is not on the path."""

from qdiff.cli.main import run

if __name__ == "__main__":
    run()
