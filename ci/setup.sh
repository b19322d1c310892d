#!/usr/bin/env bash
# Make the virtual environment: `ci/setup.sh [--venv FOLDER]`. PYTHON names the interpreter to make it with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${PYTHON:-}" ]; then
    # The lock was tried with 3.11: take it where it exists beside another default. A name on the path may be a stub.
    for PYTHON in python3.11 python3 python3.12 python3.13; do
        if "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then break; fi
        PYTHON=
    done
    if [ -z "$PYTHON" ]; then
        echo "setup failed: no Python 3.11 to 3.13 on the path: install one, or name it with PYTHON=/path/to/python" >&2
        exit 1
    fi
fi
exec "$PYTHON" -m ci.setup.environment "$@"
