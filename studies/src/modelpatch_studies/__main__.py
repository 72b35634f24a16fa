"""`python -m modelpatch_studies`: the command."""

from modelpatch_studies.command import main

main()
