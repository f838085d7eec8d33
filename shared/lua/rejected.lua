-- The input cannot be run.
-- ARGV: id, token, JSON list of file ids it reads, total, problem JSON... -> 1, or 0 if lost.
local id, token, files, total = ARGV[1], ARGV[2], cjson.decode(ARGV[3]), ARGV[4]
if not holds(id, 'plan', token) then return 0 end
drop_lease(id, 'plan')
for i = 5, math.min(#ARGV, MAX_PROBLEMS + 4) do redis.call('RPUSH', key(id, 'problems'), ARGV[i]) end
redis.call('HSET', key(id), 'total', total)
transition(id, 'failed')
leave_lane(id)
redis.call('ZADD', P .. 'ended', math.floor(now_ms() / 1000), id)
redis.call('ZREM', P .. 'deadlines', id)
let_go(id, files)
redis.call('DEL', key(id, 'retry'), key(id, 'attempts'))
recount(id)
return 1
