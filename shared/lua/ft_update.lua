-- What the holder of a job says, which is on disk by now: the whole record, events, a new state.
-- ARGV: id, token, state or '', 1 to let go, delay ms, at (s), record JSON, stage, attempts,
-- waiting_for, seconds of a training step or '', then key, text of each event
-- -> nil if the lease was lost, 'refused', 'done' if it was done already, or {events added by this script...}.
local id, token, to, lets_go, delay, at = unpack(ARGV)
local record, stage, attempts, waiting_for, step_s = unpack(ARGV, 7, 11)
if not holds(id, JOB, token) then
  -- The first answer may have been lost on its way: then this very step has been done.
  if lets_go == '1' and field(id, 'let_go') == token .. ' ' .. to then return 'done' end
  return nil
end
local from = field(id, 'state')
if to ~= '' and to ~= from and not FINETUNE_TRANSITIONS[from][to] then return 'refused' end
for i = 12, #ARGV, 2 do ft_push(id, ARGV[i], ARGV[i + 1]) end
redis.call('HSET', key(id), 'record', record, 'stage', stage, 'attempts', attempts,
  'waiting_for', waiting_for)
if step_s ~= '' and from == 'running' then
  local model = cjson.decode(field(id, 'spec')).model
  redis.call('HSET', P .. 'finetune_steps', id, cjson.encode({ model, tonumber(step_s) }))
end
if to ~= '' and to ~= from then ft_transition(id, to, at) end
if lets_go == '1' then
  redis.call('HSET', key(id), 'let_go', token .. ' ' .. to)
  drop_lease(id, JOB)
  if tonumber(delay) > 0 then
    redis.call('HSET', key(id, 'delays'), JOB, now_ms() + tonumber(delay))
  end
  ft_settle(id, at)
end
return told
