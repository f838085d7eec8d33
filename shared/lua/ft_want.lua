-- The owner's wish, which is on disk by now. ARGV: id, run|pause|cancel, at (s)
-- -> {'missing'}, {'refused'}, or {'ok', events added by this script...}.
local id, wanted, at = unpack(ARGV)
local state, before = field(id, 'state'), field(id, 'wanted')
if not state then return { 'missing' } end
if ft_is_terminal(state) and not (state == 'cancelled' and wanted == 'cancel') then
  return { 'refused' }
end
if before == 'cancel' and wanted ~= 'cancel' then return { 'refused' } end
redis.call('HSET', key(id), 'wanted', wanted)
if before ~= wanted then
  if holder(id, JOB) then
    local messages = { run = 'It is to go on', pause = 'It is to pause; it stops at a checkpoint',
      cancel = 'It is to be cancelled; it stops at a checkpoint' }
    ft_tell(id, 'info', messages[wanted])
  else
    redis.call('HDEL', key(id, 'delays'), JOB)
  end
  ft_settle(id, at)
end
return { 'ok', unpack(told) }
