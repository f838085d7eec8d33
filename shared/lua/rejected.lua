-- The input cannot be run. ARGV: id, token, input file id, total, problem JSON... -> 1, or 0 if lost.
local id, token, input, total = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if not holds(id, 'plan', token) then return 0 end
drop_lease(id, 'plan')
for i = 5, math.min(#ARGV, MAX_PROBLEMS + 4) do redis.call('RPUSH', key(id, 'problems'), ARGV[i]) end
redis.call('HSET', key(id), 'total', total)
transition(id, 'failed')
leave_lane(id)
redis.call('ZADD', P .. 'ended', math.floor(now_ms() / 1000), id)
redis.call('ZREM', P .. 'deadlines', id)
redis.call('SREM', P .. 'users:' .. input, id)
redis.call('DEL', key(id, 'retry'), key(id, 'attempts'))
recount(id)
return 1
