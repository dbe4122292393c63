"""The command line: `workbench demo | models | trace | heads | verify | report | runs`.

One module a command group; `session` holds what they share, `options` the arguments of several, `progress` the bars,
`tables` what is printed.
Results go to stdout, everything else to stderr. Nothing heavy is imported until a command runs, so that every
`--help` answers at once.
"""

from __future__ import annotations

from workbench.cli.app import main as main
