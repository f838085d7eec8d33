-- More of an image set is listed and on disk: its chunks may be claimed.
-- ARGV: id, token, model, chunks, total, 1 if that is all of it, of a sample how many images were
-- looked at and 1 if those are all (else '', ''), of a sync how many entries are known, duplicates
-- and passed (else 0, 0, 0), then problem JSON... -> 1, or 0 if lost.
local id, token, model, chunks, total, complete, seen, seen_all, known, duplicates, passed = unpack(ARGV)
if not holds(id, 'plan', token) then return 0 end
redis.call('HSET', key(id), 'model', model, 'chunks', chunks, 'total', total)
if seen ~= '' then redis.call('HSET', key(id), 'seen', seen, 'seen_all', seen_all) end
redis.call('HSET', key(id), 'known', known, 'duplicates', duplicates, 'passed', passed)
redis.call('HDEL', key(id), 'warning')
-- The problems of the whole set are told whole every time; those of its lines come with commits.
for i = 12 + tonumber(field(id, 'listing_problems') or 0), #ARGV do
  if redis.call('LLEN', key(id, 'problems')) >= MAX_PROBLEMS then break end
  redis.call('RPUSH', key(id, 'problems'), ARGV[i])
end
redis.call('HSET', key(id), 'listing_problems', #ARGV - 11)
if complete == '1' then
  drop_lease(id, 'plan')
  redis.call('HDEL', key(id), 'listing')
  redis.call('HDEL', key(id, 'attempts'), 'plan')
else
  redis.call('HSET', key(id), 'listing', 1)
end
if field(id, 'state') == 'validating' and not field(id, 'stop_reason') then
  transition(id, 'in_progress')
  enter_lane(id, 'model/' .. model)
end
settle(id)
recount(id)
return 1
