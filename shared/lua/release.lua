-- Give a unit back unfinished.
-- ARGV: id, unit, token, delay ms, warning, 1 if this counts as an attempt -> 1, or 0 if it was lost.
local id, unit, token, delay, warning, counts = unpack(ARGV)
if not holds(id, unit, token) then return 0 end
drop_lease(id, unit)
if warning ~= '' then redis.call('HSET', key(id), 'warning', warning) end
if counts == '1' then redis.call('HINCRBY', key(id, 'attempts'), unit, 1) end
offer(id, unit, now_ms() + tonumber(delay))
settle(id)
recount(id)
return 1
