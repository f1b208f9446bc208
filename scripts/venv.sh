# Sourced by quickstart.sh and test.sh, from the repository root, and by scripts/bench/peers/, from a folder of a peer.

say() { echo "$*" >&2; }

# make_venv requirements.txt: .venv with these requirements in it. A stamp holds their checksum and is written last,
# so an interrupted install is taken up again and a finished one costs nothing.
make_venv() {
    local python=${PYTHON:-python3} torch stamp=".venv/.${1%.txt}" checksum
    checksum=$(cat requirements*.txt | cksum)
    if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$checksum" ]; then
        return
    fi
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
        if ! command -v "$python" >/dev/null; then
            say "error: $python not found; install Python 3.11 or newer, or set PYTHON=/path/to/python3"
            exit 2
        fi
        if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            say "error: $("$python" --version 2>&1) is too old; Python 3.11 or newer is needed" \
                "(set PYTHON=/path/to/python3.12 to choose one)"
            exit 2
        fi
        say "Making .venv with $("$python" --version) ..."
        if ! "$python" -m venv .venv >&2; then
            say "error: $python -m venv failed; on Debian and Ubuntu: apt-get install python3-venv"
            exit 2
        fi
    fi
    say "Installing $1 (several minutes the first time) ..."
    # PyPI's torch for Linux brings gigabytes of CUDA libraries, which a machine without an NVIDIA GPU does not need
    torch=$(grep '^torch==' requirements.txt || true)
    if [ -n "$torch" ] && [ "$(uname -s)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
        pip_install --no-deps --extra-index-url https://download.pytorch.org/whl/cpu "$torch"
    fi
    pip_install -r "$1"
    echo "$checksum" >"$stamp"
}

pip_install() {
    if ! .venv/bin/python -m pip install -q --disable-pip-version-check "$@" >&2; then
        say "error: the installation failed (see above); run this again to take it up where it stopped"
        exit 1
    fi
}
