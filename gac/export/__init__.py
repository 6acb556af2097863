"""Networks outside this package: as files of other programs, with how far what these compute differs from ours."""
