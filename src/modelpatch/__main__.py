"""`python -m modelpatch`: the command line where its script is not on the path."""

from modelpatch.cli.main import main

if __name__ == "__main__":
    main()
