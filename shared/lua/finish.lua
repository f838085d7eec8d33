-- Output and error files are on disk. ARGV: id, token, JSON list of file ids it reads, terminal state,
-- output file id, error file id, completed, failed -> 1, or 0 if the lease was lost.
local id, token, files, state, output, errors, completed, failed = unpack(ARGV)
if not holds(id, 'final', token) then return 0 end
drop_lease(id, 'final')
local model = field(id, 'model')
local never_run = failed - (field(id, 'failed') or 0)
if model then count(never_run, 'vlmq_batch_items_total', model, 'never_run') end
if never_run > 0 and field(id, 'stop_reason') then
  redis.call('HINCRBY', key(id), 'count:failed:batch_' .. field(id, 'stop_reason'), never_run)
end
redis.call('HSET', key(id), 'output_file_id', output, 'error_file_id', errors,
  'completed', completed, 'failed', failed)
redis.call('HDEL', key(id), 'warning')
transition(id, state)
leave_lane(id)
redis.call('ZADD', P .. 'ended', math.floor(now_ms() / 1000), id)
redis.call('ZREM', P .. 'deadlines', id)
let_go(id, cjson.decode(files))
redis.call('DEL', key(id, 'retry'), key(id, 'attempts'), key(id, 'leases'),
  key(id, 'commits'))
recount(id)
return 1
