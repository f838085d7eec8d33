-- A checkpoint shall be converted and served. ARGV: id, step, entry JSON -> 1, or 0 if that is asked
-- for already or done.
local id, step, entry = unpack(ARGV)
local before = redis.call('HGET', key(id, 'served'), step)
if before and not cjson.decode(before).error then return 0 end
redis.call('HSET', key(id, 'served'), step, entry)
redis.call('HDEL', key(id, 'tries'), step)
line_up(FT_CHECKPOINTS, field(id, 'owner'), id .. '|' .. step)
return 1
