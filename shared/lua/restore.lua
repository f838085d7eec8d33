-- Put a batch that Redis lost back from what shared storage holds. Does nothing if it is there.
-- ARGV: id, JSON list of file ids it reads, created_at ms, expires_at s, terminal (1/0), commits (binary),
-- problems (JSON list), missing chunks (JSON list), then field, value... of the record -> 1 or 0.
local id, files, created_ms, expires_at, terminal, commits = unpack(ARGV)
if redis.call('EXISTS', key(id)) == 1 then return 0 end
redis.call('HSET', key(id), 'created_ms', created_ms)
for i = 9, #ARGV, 2 do redis.call('HSET', key(id), ARGV[i], ARGV[i + 1]) end
for _, problem in ipairs(cjson.decode(ARGV[7])) do
  redis.call('RPUSH', key(id, 'problems'), problem)
end
redis.call('ZADD', P .. 'batches:' .. field(id, 'owner'), created_ms, id)
if terminal == '1' then
  local ended_at = field(id, field(id, 'state') .. '_at') or created_ms / 1000
  redis.call('ZADD', P .. 'ended', ended_at, id)
  return 1
end
take_set(id, field(id, 'syncs') or '')
redis.call('SET', key(id, 'commits'), commits)
for _, chunk in ipairs(cjson.decode(ARGV[8])) do offer(id, tostring(chunk), 0) end
redis.call('ZADD', P .. 'deadlines', expires_at, id)
for _, file in ipairs(cjson.decode(files)) do redis.call('SADD', P .. 'users:' .. file, id) end
if field(id, 'listing') then offer(id, 'plan', 0) end
enter_lane(id, 'model/' .. field(id, 'model'))
enter_state(id, field(id, 'state'))
settle(id)
recount(id)
return 1
