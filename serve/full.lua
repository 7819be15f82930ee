-- What serve/gate.py answers when the house is full, said by HAProxy: the body is read to its end, so that who is still
-- sending gets the answer and keeps the connection.
core.register_service("full", "http", function(applet)
  local announced = applet.headers["content-length"]
  local left = announced and tonumber(announced[0]) or 0
  while left > 0 do
    local part = applet:receive(left)
    if part == "" then
      return
    end
    left = left - #part
  end
  local id = applet.f:uuid()
  local body = '{"type": "about:blank", "title": "Service Unavailable", "status": 503, '
    .. '"detail": "the service is full", "request_id": "' .. id .. '"}'
  applet:set_status(503)
  applet:add_header("content-type", "application/problem+json")
  applet:add_header("content-length", tostring(#body))
  applet:add_header("retry-after", os.getenv("SCOPEWORKS_RETRY_SECONDS"))
  applet:add_header("x-request-id", id)
  applet:add_header("x-content-type-options", "nosniff")
  applet:start_response()
  applet:send(body)
end)
