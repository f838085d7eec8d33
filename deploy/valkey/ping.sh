#!/bin/sh
# Healthy or not: whether Valkey on this machine takes the password of a file and answers.
#
#   ping.sh PASSWORD_FILE
set -eu

# By environment, for arguments can be read by everybody on the machine.
REDISCLI_AUTH=$(cat "$1")
export REDISCLI_AUTH
test "$(valkey-cli -h 127.0.0.1 ping)" = PONG
