-- Put a job that Redis lost back from what shared storage holds. Does nothing if it is there.
-- ARGV: id, owner, spec JSON, created_at ms, GPUs, ids of used files (JSON list), record JSON, stage,
-- attempts, waiting_for, state, wanted, finished_at or '', token, number of conversions, then
-- step, entry JSON, 1 if it is to be done of each, then key, text of each event -> 1 or 0.
local id, owner, spec, created_ms, gpus, uses, record, stage, attempts = unpack(ARGV)
local waiting_for, state, wanted, finished_at, token = unpack(ARGV, 10, 14)
if redis.call('EXISTS', key(id)) == 1 then return 0 end
redis.call('HSET', key(id), 'owner', owner, 'spec', spec, 'record', record, 'gpus', gpus, 'uses', uses,
  'state', state, 'wanted', wanted, 'stage', stage, 'attempts', attempts, 'token', token,
  'waiting_for', waiting_for)
redis.call('ZADD', P .. 'finetunes:' .. owner, created_ms, id)
local at = 16
for _ = 1, tonumber(ARGV[15]) do
  redis.call('HSET', key(id, 'served'), ARGV[at], ARGV[at + 1])
  if ARGV[at + 2] == '1' then line_up(FT_CHECKPOINTS, owner, id .. '|' .. ARGV[at]) end
  at = at + 3
end
for i = at, #ARGV, 2 do ft_push(id, ARGV[i], ARGV[i + 1]) end
ft_enter_state(id, state, finished_at)
ft_place(id)
return 1
