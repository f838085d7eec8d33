-- Enter a new job. ARGV: id, owner, spec JSON, created_at ms, GPUs, ids of used files (JSON list),
-- key of the first event, its text -> 1, or 0 if it is there.
local id, owner, spec, created_ms, gpus, uses = unpack(ARGV)
if redis.call('EXISTS', key(id)) == 1 then return 0 end
redis.call('HSET', key(id), 'owner', owner, 'spec', spec, 'record', '{}', 'gpus', gpus, 'uses', uses,
  'state', 'validating_files', 'wanted', 'run', 'stage', 'validate', 'attempts', 0, 'token', 0)
redis.call('ZADD', P .. 'finetunes:' .. owner, created_ms, id)
ft_push(id, ARGV[7], ARGV[8])
ft_enter_state(id, 'validating_files')
ft_place(id)
count(1, 'vlmq_finetunes_created_total')
return 1
