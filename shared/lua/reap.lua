-- Take expired leases back, and those of workers known to be dead. ARGV: worker... -> {member...}.
local lost, expired = lost_leases(P .. 'leases', P .. 'held:', ARGV)
local taken = {}
for number, member in ipairs(lost) do
  local id, unit = string.match(member, '^([^|]+)|(.+)$')
  if holder(id, unit) then
    drop_lease(id, unit)
    redis.call('HINCRBY', key(id, 'attempts'), unit, 1)
    offer(id, unit, 0)
    settle(id)
    recount(id)
    count(1, 'vlmq_leases_reaped_total', number > expired and 'worker_died' or 'expired')
    taken[#taken + 1] = member
  else
    redis.call('ZREM', P .. 'leases', member)
  end
end
return taken
