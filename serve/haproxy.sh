#!/bin/sh
# HAProxy as Ray starts it, but without its own two pages, which would be open to the network; without splicing (-dS),
# which leaves a caller waiting whose request is refused before its body is read (tests/bench/LOG.md); and it ends when
# the process that started it is killed.
for argument; do
  case $argument in *.cfg) sed -i -e '/^frontend prometheus/,/no log/d' -e '/^listen stats/,$d' "$argument" ;; esac
done
exec setpriv --pdeathsig TERM "$SCOPEWORKS_HAPROXY" -dS "$@"
