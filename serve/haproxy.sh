#!/bin/sh
# HAProxy as Ray starts it, but without its own two pages, which would be open to the network; without splicing (-dS),
# which leaves a caller waiting whose request is refused before its body is read (tests/bench/LOG.md); with bodies that
# are larger than the limit or do not say how large they are let in slowly, each at 8 MiB a second, since reading them
# to their end takes the cores from other callers; and it ends when the process that started it is killed.
slowly="\
    filter bwlim-in slowly default-limit 8m default-period 1s\n\
    http-request set-bandwidth-limit slowly if { req.hdr_val(content-length) gt $SCOPEWORKS_BODY_BYTES }\n\
    http-request set-bandwidth-limit slowly if { req.hdr(transfer-encoding) -m found }"
for argument; do
  case $argument in
  *.cfg)
    sed -i -e '/^frontend prometheus/,/no log/d' -e '/^listen stats/,$d' -e "/^frontend http_frontend/a $slowly" "$argument"
    ;;
  esac
done
exec setpriv --pdeathsig TERM "$SCOPEWORKS_HAPROXY" -dS "$@"
