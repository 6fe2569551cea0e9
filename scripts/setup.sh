# Sourced by scripts/demo, scripts/test and .ci/run from the repository root; makes no move by itself.
#
#   setup_venv VENV FILE...   make VENV with the packages that the FILEs pin, and this package, editable.
#
# The pins name every package, so pip resolves nothing (--no-deps) and cannot pick another version. What
# was installed is noted in VENV: a second call with the same FILEs and pyproject.toml does nothing.

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3.14 python3}; do
    if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "found no Python 3.11 or newer with the venv module (tried ${PYTHON:-python3.11 to 3.14, python3});" \
    "install one (Debian: apt install python3 python3-venv) or set PYTHON=/path/to/python3" >&2
  return 1
}

make_venv() {
  local venv="$1" python
  python="$(find_python)"
  echo "== making $venv with $("$python" --version)"
  if "$python" -c 'import ensurepip' 2>/dev/null; then
    "$python" -m venv "$venv"
  else # Debian without python3-venv: borrow the system's pip for the first install
    "$python" -m venv --without-pip "$venv"
    "$python" -m pip --python "$venv/bin/python" install --quiet pip
  fi
}

setup_venv() {
  local venv="$1" file names wanted
  shift
  names="$(basename -a "$@" | tr '\n' '+')"
  wanted="$venv/.installed-${names%+}"
  if cmp --silent "$wanted" <(cat "$@" pyproject.toml); then
    return
  fi
  "$venv/bin/python" -m pip --version >/dev/null 2>&1 || make_venv "$venv"
  for file in "$@"; do
    echo "== installing $(grep -c == "$file") pinned packages of $file into $venv"
    "$venv/bin/python" -m pip install --quiet --no-deps --requirement "$file"
  done
  echo "== installing opd-jax (editable) into $venv"
  "$venv/bin/python" -m pip install --quiet --no-deps --editable .
  cat "$@" pyproject.toml >"$wanted" # last, so that a broken install is done again
}
