-- ARGV: id, unit, token, ttl ms -> nil if the lease is lost, else the stop reason or ''.
local id, unit, token, ttl = unpack(ARGV)
if not holds(id, unit, token) then return nil end
redis.call('ZADD', P .. 'leases', now_ms() + tonumber(ttl), id .. '|' .. unit)
if field(id, 'state') == 'finalizing' then return '' end
return field(id, 'stop_reason') or ''
