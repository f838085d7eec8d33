-- The plan is on disk. ARGV: id, token, model, chunks, total -> 1, or 0 if the lease was lost.
local id, token, model, chunks, total = unpack(ARGV)
if not holds(id, 'plan', token) then return 0 end
drop_lease(id, 'plan')
redis.call('HSET', key(id), 'model', model, 'chunks', chunks, 'total', total)
redis.call('HDEL', key(id), 'warning')
if not field(id, 'stop_reason') then
  transition(id, 'in_progress')
  enter_lane(id, 'model/' .. model)
end
settle(id)
recount(id)
return 1
