-- Take expired leases back, and those of workers known to be dead. ARGV: worker...
-- -> {{id, unit, events added by this script...}...}.
local now = now_ms()
local lost, expired = lost_leases(P .. 'finetune_leases', P .. 'finetune_held:', ARGV)
local taken = {}
for number, member in ipairs(lost) do
  local id, unit = ft_unit(member)
  if holder(id, unit) and redis.call('EXISTS', key(id)) == 1 then
    local died = number > expired
    drop_lease(id, unit)
    if unit == JOB then
      redis.call('HINCRBY', key(id), 'attempts', 1)
      ft_tell(id, 'warn', died and 'Its worker died; another one goes on from the last checkpoint'
        or 'Its worker was not heard of; another one goes on from the last checkpoint')
      ft_settle(id, math.floor(now / 1000))
    else
      redis.call('HINCRBY', key(id, 'tries'), unit, 1)
      line_up(FT_CHECKPOINTS, field(id, 'owner'), member)
    end
    count(1, 'vlmq_finetune_leases_reaped_total', died and 'worker_died' or 'expired')
    taken[#taken + 1] = { id, unit, unpack(told) }
    told = {}
  else
    drop_lease(id, unit)
  end
end
return taken
