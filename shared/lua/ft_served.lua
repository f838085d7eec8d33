-- A checkpoint was converted, or cannot be. ARGV: id, step, token, entry JSON, key, text of an event
-- -> 1, or nil if the lease was lost.
local id, step, token, entry = unpack(ARGV)
if not holds(id, step, token) then
  return redis.call('HGET', key(id, 'served'), step) == entry and 1 or nil
end
redis.call('HSET', key(id, 'served'), step, entry)
redis.call('HDEL', key(id, 'tries'), step)
ft_push(id, ARGV[5], ARGV[6])
drop_lease(id, step)
return 1
