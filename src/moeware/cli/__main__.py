"""``python -m moeware.cli``, for where the script is not on PATH."""

from moeware.cli import main

raise SystemExit(main())
