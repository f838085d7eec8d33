-- Give a checkpoint back unconverted. ARGV: id, step, token, delay ms, 1 if it counts as an attempt
-- -> 1, or 0 if the lease was lost.
local id, step, token, delay, counts = unpack(ARGV)
if not holds(id, step, token) then return 0 end
drop_lease(id, step)
if counts == '1' then redis.call('HINCRBY', key(id, 'tries'), step, 1) end
redis.call('HSET', key(id, 'delays'), step, now_ms() + tonumber(delay))
line_up(FT_CHECKPOINTS, field(id, 'owner'), id .. '|' .. step)
return 1
