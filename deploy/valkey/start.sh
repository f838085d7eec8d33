#!/bin/sh
# Become a Valkey that asks for the password of a file:
#
#   start.sh CONFIG PASSWORD_FILE [--OPTION VALUE]...
#
# The password reaches the server by standard input, so it is in no argument, variable or second file.
set -eu

config=$1 password_file=$2
shift 2
password=$(cat "$password_file")
case $password in
'' | *[!A-Za-z0-9_-]*)
    echo "start.sh: $password_file must hold letters, digits, - and _ only, such as the output" \
        "of: openssl rand -hex 32" >&2
    exit 1
    ;;
esac

exec valkey-server "$config" "$@" - <<END
requirepass $password
END
