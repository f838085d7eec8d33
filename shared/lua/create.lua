-- ARGV: id, owner, spec JSON, created_at ms, expires_at s, the set that it syncs or '', file id it
-- reads... -> 1, 0 if it exists, or the id of the batch that syncs the set already.
local id, owner, spec, created_ms, expires_at, set = unpack(ARGV)
if redis.call('EXISTS', key(id)) == 1 then return 0 end
local other = take_set(id, set)
if other then return other end
redis.call('HSET', key(id), 'owner', owner, 'spec', spec, 'state', 'validating', 'next', 0,
  'chunks', 0, 'committed', 0, 'token', 0, 'created_ms', created_ms)
redis.call('ZADD', P .. 'batches:' .. owner, created_ms, id)
redis.call('ZADD', P .. 'deadlines', expires_at, id)
for i = 7, #ARGV do redis.call('SADD', P .. 'users:' .. ARGV[i], id) end
enter_lane(id, CONTROL)
offer(id, 'plan', 0)
enter_state(id, 'validating')
count(1, 'vlmq_batches_created_total')
recount(id)
return 1
