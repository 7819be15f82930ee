#!/bin/sh
# HAProxy as Ray starts it, but without its own two pages, which would be open to the network; without splicing (-dS),
# which leaves a caller waiting whose request is refused before its body is read (tests/bench/LOG.md); with bodies that
# are larger than the limit or do not say how large they are let in slowly, each at 8 MiB a second, since reading them
# to their end takes the cores from other callers; for 3 ms after the gate refused a request because the house was full,
# refusing the next ones itself (full.lua), at a tenth of the cost, though /metrics does not count these; and it ends
# when the process that started it is killed.
more="\
    filter bwlim-in slowly default-limit 8m default-period 1s\n\
    acl too_large req.hdr_val(content-length) gt $SCOPEWORKS_BODY_BYTES\n\
    acl of_no_length req.hdr(transfer-encoding) -m found\n\
    http-request set-bandwidth-limit slowly if too_large || of_no_length\n\
    http-request use-service lua.full if { path_beg /v1/ } { date(0,ms),sub(proc.full_until) lt 0 } !too_large !of_no_length\n\
    http-response set-var(proc.full_until) date(3,ms) if { res.hdr(x-full) -m found }\n\
    http-response del-header x-full"
for argument; do
  case $argument in
  *.cfg)
    sed -i -e '/^frontend prometheus/,/no log/d' -e '/^listen stats/,$d' -e "/^frontend http_frontend/a $more" \
      -e "/^global/a \    lua-load-per-thread \"$(dirname "$0")/full.lua\"" "$argument"
    ;;
  esac
done
exec setpriv --pdeathsig TERM "$SCOPEWORKS_HAPROXY" -dS "$@"
